"""Who is measured: one file for each contender, all behind the small interface of `base.py`."""
