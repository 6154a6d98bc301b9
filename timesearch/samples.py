"""Rows by their earlier name: the models are in `timesearch.data.samples`, the readers in `timesearch.data.rows`."""

from timesearch.data.rows import read_all_samples, read_models, read_rows, read_samples
from timesearch.data.samples import Prediction, Sample

__all__ = ["Prediction", "Sample", "read_all_samples", "read_models", "read_rows", "read_samples"]
