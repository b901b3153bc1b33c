"""Reports of a run: gathered from its folder and the sidecar's journal, written as HTML or Markdown.

Behind `obsinfra report`. Reads only, and knows no torch: a report can be made of a run that is going on, or
of one that was copied here from elsewhere.
"""
