"""What a bit width costs on the user's own rows: the same rows through each width, side by side.

One width is the reference. It answers the rows greedily; every other width answers them too, and
then says how likely it finds the reference's answers, token by token. So two things are compared:
what a width thinks of each token (divergence, which needs few rows), and what it says in the end
(identical answers, labels, accuracy, which need many). The files, in the order of the story:

    candidates.py   names of widths -> model sections, and which of them fit
    rows.py         rows spread over the input, rendered as the job renders them
    runner.py       one width at a time: load, answer, score, free (torch)
    scoring.py      the teacher-forced pass, with the scores of few positions in memory (torch)
    divergence.py   what a model thinks of a token, in 64 numbers, and how far two are apart
    statistics.py   intervals by resampling rows, McNemar's test, the rule of three
    figures.py      what is reported of a width
    kept.py         widths that are done, until the report is written
    report.py       the whole report: JSON, table on a terminal, what may be claimed
    page.py         the same as one HTML file

Nothing here says "lossless": a comparison can only tell that no difference larger than some size
was seen with so many rows.
"""
