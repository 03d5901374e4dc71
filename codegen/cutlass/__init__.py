"""GEMMs from CUTLASS's templates: tiles, epilogues, sources."""
