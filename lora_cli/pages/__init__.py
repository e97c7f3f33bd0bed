"""HTML for people: the templates of the pages, and the one place that fills them in."""
