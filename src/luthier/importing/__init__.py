"""Configurations of other programs, LLaMA-Factory, Axolotl and TRL, as run files of ours; and what of them could not be translated."""
