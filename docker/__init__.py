"""How the service is packed and deployed: image, compose, chart. Code here runs in the image only."""
