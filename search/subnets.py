"""The former place of `jaxfm.search.trace.models`."""

from jaxfm.search.trace.models import axis_names as axis_names
from jaxfm.search.trace.models import model_network as model_network
from jaxfm.search.trace.models import to_subnet as to_subnet
