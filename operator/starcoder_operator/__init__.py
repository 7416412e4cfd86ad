"""Operator of `StarCoderRun`: who trains what, in which attempt."""
