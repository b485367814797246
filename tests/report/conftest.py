import pytest

from tests.report.support import Case, make_case


@pytest.fixture(scope="session")
def case() -> Case:
    return make_case()
