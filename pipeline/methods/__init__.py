"""The compression methods, one file per paper, in the columns of Gordon's survey (2019)."""
