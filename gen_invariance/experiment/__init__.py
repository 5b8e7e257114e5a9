"""One run of something: settings in, result out."""
