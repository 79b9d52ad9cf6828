"""The report: what runs recorded, as one document written as HTML and as Markdown."""
