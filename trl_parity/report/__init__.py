"""Files to people: Markdown, HTML, pictures, the terminal."""
