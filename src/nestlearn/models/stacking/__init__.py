"""Level stacking: MLPs of pretrained language models become levels that learn while they read (NL section 7.3)."""

from .build import freeze_backbone as freeze_backbone
from .build import level_parameters as level_parameters
from .build import stack_levels as stack_levels
from .build import unstack_levels as unstack_levels
from .classes import StackedModel as StackedModel
from .classes import load_stacked as load_stacked
from .classes import register_families as register_families
from .classes import register_family as register_family
from .families import MapNames as MapNames
from .families import find_networks as find_networks
from .learn import KeyValues as KeyValues
from .learn import Segment as Segment
from .learn import read_segment as read_segment
from .learn import stacked_model as stacked_model
from .plan import StackPlan as StackPlan
from .state import LevelFast as LevelFast
from .state import LevelState as LevelState
from .state import reading as reading
