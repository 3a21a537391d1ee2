"""Measure: data, distances, tables, timings."""
