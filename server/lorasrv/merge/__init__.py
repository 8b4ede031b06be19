"""Adapters made part of the base, or made one adapter."""
