"""The Ray Serve application: OpenAI's protocol, the router, and an engine with one modifier slot."""
