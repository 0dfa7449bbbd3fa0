"""The run-time type check of the tests: beartype, with int accepted where float is said."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
