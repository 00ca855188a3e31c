"""An Envoy ext_proc endpoint picker: which model server should take this prompt?"""

__version__ = "0.1.0"
