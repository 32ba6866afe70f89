"""Reports as one HTML file: inline style, script and pictures, nothing from the network; see `jobs.html.document`."""
