"""What every experiment stands on: claims, records, verdicts, tables, pictures, the report."""
