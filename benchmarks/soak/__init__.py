"""`make soak`: one load of good and bad requests on a compressed checkpoint's server and its dense twin's."""
