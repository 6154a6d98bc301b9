"""What is read and written: samples, predictions and messages, and the forms that others publish them in."""
