"""From predictions to scores: answers extracted by rules, references, accuracy with 95% intervals."""
