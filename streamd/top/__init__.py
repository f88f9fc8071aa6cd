"""`streamd top`: a running daemon's upstreams, streams, readers and keys in a terminal, anew every second.

    command     the flags; a sentence where the library for terminals is missing
    filter      the words of a filter: some are asked of the daemon, the others looked for in each row
    views       the tables: columns, sorts, what can be ended from a row
    layout      the columns that fit a terminal's width
    head        the lines above the tables
    look        a look at the daemon: /status and a table
    in_thread   work that waits for the daemon, off the terminal's loop
    app         the screen, its keys, and the loop that looks again and again
    dialogs     confirmations, and a row with all its members

The daemon does nothing for it but answer the admin surface, as it does for `streamd readers` (daemon/admin_cli.py,
from which the columns are). Rejected: curses, which every terminal has, but in which sorting by a click, wide
characters, dialogs and a test that presses keys are each work of our own.
"""
