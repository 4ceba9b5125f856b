"""From files to the micro-batches of an optimizer step: sources -> shapes -> render -> prepare -> feed."""
