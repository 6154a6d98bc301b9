"""The HTML report: one file that shows the table, the plots and every episode."""
