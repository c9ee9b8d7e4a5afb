"""The report: one HTML page per run, or one that compares several runs.

`records` reads log folders, `figures` and `charts` draw curves, `cases` draws example cases, `folds` joins the folds of
a cross-validation, `page` and `comparison` build the HTML, and `write` puts it on disk. May import `runtime` and
everything below it; matplotlib is imported in `figures` alone. To add a chart of a run, add a function to `charts` and
list it in `CHARTS`.
"""
