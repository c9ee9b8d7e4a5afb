"""What every package may use: errors and exit statuses, messages, files, command-line parsing, objects by name.

May import the standard library only, and no other package of this project.
To add a module: it must be needed by more than one package.
"""
