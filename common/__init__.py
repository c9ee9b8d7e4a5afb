"""Shared by every package: errors and exit statuses, messages, files, command-line parsing, objects by name.

May import the standard library only, and no other package of this project; `compat.py`, which holds every private name
and message text of another library, also imports torch.
A module belongs here if more than one package needs it.
"""
