"Reads settings.ini: requirements, extras and console scripts. All else is in pyproject.toml."
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup

cfg = ConfigParser(delimiters=['='])
cfg.read(Path(__file__).parent/'settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']

def lines(key): return [o.strip() for o in cfg[key].splitlines() if o.strip()]

extras = {k.strip(): v.split() for k, v in (o.split('=', 1) for o in lines('extras'))}

setup(python_requires=f'>={cfg["min_python"]}',
      install_requires=lines('requirements'),
      extras_require=extras,
      entry_points=dict(console_scripts=lines('console_scripts'), nbdev=['dicomcam = dicomcam._modidx:d']))
