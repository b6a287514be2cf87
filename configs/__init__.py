"""Configurations for other recipes, installed as `dmd2_fast.configs`; a wheel has the top-level ds_*.json here too."""
