"""A model as deltas meet it: where its parts are, the one attention function, streams of packed examples, what is measured at load."""
