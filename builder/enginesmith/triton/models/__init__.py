"""Files that packages copy into Triton version directories. They import nothing of enginesmith."""
