"""Data sets in files, one format a module: memory-mapped arrays and bytes, HDF5, Parquet, CSV.

For `create_memory_efficient_dataloader`, and usable with any torch loader. None holds a file in memory: what
is read ahead or kept lies in bounded caches. The packages that HDF5 and Parquet need are imported on use.
"""

from obsinfra.optimization.datasets.csv_rows import csv_rows
from obsinfra.optimization.datasets.hdf5 import hdf5_rows
from obsinfra.optimization.datasets.memory_mapped import MappedArrays, MappedBytes
from obsinfra.optimization.datasets.parquet import ParquetRows
from obsinfra.optimization.datasets.row_blocks import BlockedRows
from obsinfra.optimization.datasets.skipping import CorruptRecord, Skipped

__all__ = [
    "BlockedRows",
    "CorruptRecord",
    "MappedArrays",
    "MappedBytes",
    "ParquetRows",
    "Skipped",
    "csv_rows",
    "hdf5_rows",
]
