"""Recipes: YAML files that `mdm train --recipe NAME` finds by name."""
