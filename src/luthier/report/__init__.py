"""What is told of a run after it: report.html, the model card, and the tables of `luthier runs`, all from the files in the run's folder."""
