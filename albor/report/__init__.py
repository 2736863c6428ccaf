"""`albor report`: one page about one or several runs, in one HTML file that needs no network. No torch.

`gather` reads a run into plain data, `thin` makes a long log short without hiding its extremes, `page` writes
the HTML, and `command` puts it into a file. `page.js` draws the charts in the reader's browser.
"""
