"""The one error that users meet: it names the thing that is wrong and the remedy."""


class GDetKDError(ValueError):
    """A config, file or pair of detectors with which training would fail, or go wrong without a word."""
