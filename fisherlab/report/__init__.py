"""A report: what it is asked, the work, and the page it becomes."""
