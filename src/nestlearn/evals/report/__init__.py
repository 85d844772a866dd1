"""Reports: one self-contained HTML page each, on the pieces in `page` and `plots`."""
