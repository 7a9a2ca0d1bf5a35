"""python -m grpo.view: a local page with a run's curves, its completions, and two runs or steps compared.

In: run folders (metrics.jsonl; rollouts-rank<R>.jsonl, held_out-rank<R>.jsonl and tokens-rank<R>.jsonl of each rank;
run.json, exit.json), also while a run writes them. Out: a page on 127.0.0.1, or one HTML file. Nothing is written into
a run's folder.

    lines.py      JSON lines of unknown origin, read as they grow      metrics.py   curves of a run
    rollouts.py   an index of logged completions                       tokens.py    an index of figures of tokens
    runs.py       which folders are runs, their settings and their end
    server.py     what the page asks for                               export.py    the page and its data as one file
    page/         the page itself: no library, nothing from outside

The page is written by hand: its curves are lines with an axis, its list shows one screen of rows, and a library for
either would be larger than all of it (plotly.js: 4.7 MB in every export) or set styles that the page's
Content-Security-Policy refuses. Model text reaches the page as text nodes only.
"""
