"""How good searches and answers are: metrics, the intervals around them, and the evaluation of prediction files."""
