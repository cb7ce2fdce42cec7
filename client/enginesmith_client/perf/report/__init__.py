"""The picture: one page of HTML, Markdown or JSON from what was saved."""
