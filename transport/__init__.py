"""How processes talk: pipes, their life, published weights."""
