"""The command line: parse, call one function, print.

    app.py        the parser of all commands, exit codes, signals
    models.py     plan, splice, verify
    runs.py       train, eval, run, report
    comparing.py  compare, advise
    options.py    options that several commands share
    printing.py   tables, JSON, the progress bar

It is built on argparse, because a splice may take a fifth of a second and what parses its
command must not take longer.
"""

from taia.cli.app import main

__all__ = ["main"]
