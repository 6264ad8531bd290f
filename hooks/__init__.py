"""Hook points of MAIRA-2, one door per host library."""
