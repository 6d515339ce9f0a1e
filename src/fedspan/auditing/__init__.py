"""Attacks on a finished run or an adapter, and the dossier that says what they found."""
