"""A NumPy model of the mechanisms that loops over tokens, for tests of the engines."""

from tests.oracle.score import OracleOutput, oracle_score

__all__ = ["OracleOutput", "oracle_score"]
