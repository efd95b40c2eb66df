"`python -m dicomcam` is the command `dicomcam`."
from dicomcam.cli import main

main(prog_name="dicomcam")
