"""What a training run will take, before it starts: `plan`."""

from nestlearn.train.planning.devices import GPUS, Device, gpu, this_processor
from nestlearn.train.planning.plan import Choice, Memory, Plan, plan
from nestlearn.train.planning.trace import StepCost, step_cost

__all__ = ["GPUS", "Choice", "Device", "Memory", "Plan", "StepCost", "gpu", "plan", "step_cost", "this_processor"]
