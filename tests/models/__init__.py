"""Tests of loading and running models."""
