"""Any model with its optimizer as a system of nested problems: shown, measured, and built from parts."""
