"The run-time check of annotations that the tests switch on: beartype, which takes whole numbers where floats are wanted."

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
